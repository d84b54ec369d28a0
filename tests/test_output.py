"""Files as conversions write them: what is in them, what their sums are of, and when memory may be used again."""

import hashlib
import io
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from shardproof.bridges.io.dcp import _archive, _frame, _save
from shardproof.bridges.io.output import Journal, Output
from shardproof.bridges.io.slices import SMALL
from shardproof.bridges.streaming import Memory


def test_zeros_are_holes_and_digests_are_of_the_whole(tmp_path):
    """Runs of zeros take no room on the disk and are in the file all the same, at its end too."""
    content = os.urandom(2**20 + 5) + bytes(8 * 2**20) + b"end" + bytes(4 * 2**20)
    with ThreadPoolExecutor(1) as pool:
        file = Output(tmp_path / "file", pool)
        for part in (content[:10], content[10 : 3 * 2**20], content[3 * 2**20 :]):
            file.write(part)
        done = file.finish().result()
    assert (tmp_path / "file").read_bytes() == content
    assert done == {"file": "file", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (tmp_path / "file").stat().st_blocks * 512 < len(content) - 6 * 2**20


class Late(ThreadPoolExecutor):
    """Does everything late."""

    def submit(self, work, *args):
        """The same, a moment later."""

        def later():
            time.sleep(0.01)
            return work(*args)

        return super().submit(later)


@pytest.mark.parametrize("kind", ("sha256", "crc32"))
@pytest.mark.parametrize("lasting", (False, True))
def test_sums_are_of_what_was_written(tmp_path, kind, lasting):
    """Tensors that follow each other in the same memory, a sum that is late: it is of the bytes in the file. Small ones lie in two blocks."""
    memory, sizes = Memory(), [3, 70_000, 20, 400_000, 70_000, 8, 9, 1 << 20, 100_000]
    with Late(1) as pool:
        file = Output(tmp_path / "file", pool, kind)
        for n, size in enumerate(sizes * 3):
            values = memory.tensor((size,), torch.uint8)
            values.fill_(n + 1)
            assert file.write(b"before", values.numpy(), b"behind", lasting=lasting) == size + 12
            if not lasting:
                values.fill_(0)
        done = file.finish().result()
    content = b"".join(b"before" + bytes([n + 1]) * size + b"behind" for n, size in enumerate(sizes * 3))
    assert (tmp_path / "file").read_bytes() == content
    want = hashlib.sha256(content).hexdigest() if kind == "sha256" else f"{zlib.crc32(content):08x}"
    assert done == {"file": "file", "size": len(content), kind: want}


def test_large_tensors_have_one_block():
    """What waits beside the tensor at work is small."""
    memory = Memory()
    large = [memory.tensor((SMALL + 1,), torch.uint8).data_ptr() for _ in range(3)]
    small = [memory.tensor((5,), torch.uint8).data_ptr() for _ in range(4)]
    assert len(set(large)) == 1 and small[0] == small[2] != small[1] == small[3] and large[0] not in small


@pytest.mark.parametrize("kind", ("sha256", "crc32"))
def test_a_journal_keeps_whole_files_alone(tmp_path, kind):
    """A file whose bytes or size changed since is none that an interrupted conversion may keep."""
    with ThreadPoolExecutor(1) as pool:
        journal = Journal(tmp_path, 0)
        for name in ("one", "two", "three"):
            file = Output(tmp_path / name, pool, kind)
            file.write(os.urandom(1000))
            journal.add(file.finish().result())
    content = bytearray((tmp_path / "two").read_bytes())
    content[500] ^= 1
    (tmp_path / "two").write_bytes(content)
    os.truncate(tmp_path / "three", 999)
    assert [entry["file"] for entry in Journal(tmp_path, 0).entries] == ["one"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64))
@pytest.mark.parametrize("shape", ((), (1,), (7, 5), (1, 3, 200, 90), (0, 4)))
def test_entries_are_torchs_archives(tmp_path, shape, dtype):
    """Byte for byte what torch.save makes of the tensor, in the same settings, and loadable."""
    values = (torch.randn(shape) * 20).to(dtype)
    stream = io.BytesIO()
    _archive(values, stream)
    with ThreadPoolExecutor(1) as pool:
        file = Output(tmp_path / "file", pool)
        _save(values, file)
        file.finish().result()
    assert (tmp_path / "file").read_bytes() == stream.getvalue()
    back = torch.load(tmp_path / "file", weights_only=True)
    assert back.dtype == dtype and back.shape == values.shape
    assert torch.equal(back.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8)) or not values.numel()


def test_a_frame_is_made_once_a_shape():
    """Thousands of experts have one."""
    _frame.cache_clear()
    for _ in range(5):
        _frame((4, 6), torch.bfloat16)
    assert _frame.cache_info().misses == 1
