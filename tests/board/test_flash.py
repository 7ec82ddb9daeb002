"""The relay table on a board's flash: power cuts, bytes written, memory.

The scripts can be run by hand, with tests/board/runtimes.py.
"""

import runtimes

HERE = runtimes.REPO / "tests" / "board"


def test_power_cuts_at_every_write(micropython):
    micropython(HERE / "power_cut.py", heap="8m", seconds=900)


def test_bytes_on_flash_of_7200_relays(micropython, bits):
    # Until it took place in each shard, new relays cost less.
    hours = 17 if bits == "64" else 2
    print(micropython(HERE / "flash_size.py", 7200, 2, hours, heap="16m", seconds=900))


def test_peak_memory_does_not_depend_on_the_number_of_relays(tmp_path):
    def peak(count, n):
        folder = tmp_path / ("%d-%d" % (count, n))
        folder.mkdir()
        line = runtimes.command("32", HERE / "flash_heap.py", HERE.parent, count, folder)
        return int(runtimes.run_script(*line, 900).split("peak ")[1].split()[0])

    # The dates of guards are chance, and move it by some blocks of the heap.
    peaks = [min([peak(count, n) for n in range(3)]) for count in (1000, 7200)]
    assert max(peaks) - min(peaks) <= 1024 and max(peaks) <= 24 << 10, peaks
