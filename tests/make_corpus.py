"""Writes the files of ``tests/corpus`` that are made by hand: ``python tests/make_corpus.py``.

Each is in the folder of its reader (``fuzz_files.readers``), which has to refuse it; its name says what is
wrong with it. What ``fuzz_files.py`` found lies beside them under names that begin with ``found``.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import cifar_files
import numpy as np
import torch

CORPUS = Path(__file__).resolve().parent / "corpus"
FOLDER = "cifar-10-batches-bin"
DOUBLED = b"\x80\x02}X\x01\x00\x00\x00a" + b"q\x01h\x01\x86" * 70 + b"Ns."
"""A dict whose key is a tuple of two tuples of two tuples ...: its hash takes 2^70 steps."""


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def pickles() -> dict[str, bytes]:
    return {
        "executes": pickle.dumps({b"labels": [0], b"data": Evil()}, protocol=2),
        "claims-64-GiB-of-memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "claims-2-GiB-of-bytes": b"\x80\x03B\xff\xff\xff\x7f.",
        "claims-2-EiB-of-bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**61) + b".",
        "claims-2-EiB-of-frame": b"\x80\x04\x95" + struct.pack("<Q", 2**61) + b"N.",
        "hashes-for-ever": DOUBLED,
        "is-nested-deeply": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
        "contains-itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "has-no-end": b"\x80\x02}",
        "has-text-of-surrogates": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
        "is-empty": b"",
    }


def tar(*members: tuple[str, bytes, bytes], claimed: int | None = None) -> bytes:
    """A packed archive of members: name, type, content; the last one's size as ``claimed``."""
    file = io.BytesIO()
    for i, (name, kind, content) in enumerate(members):
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
        entry.size = len(content) if claimed is None or i < len(members) - 1 else claimed
        file.write(entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    return gzip.compress(file.getvalue() + bytes(1024), 9, mtime=0)


def archives() -> dict[str, bytes]:
    first = f"{FOLDER}/data_batch_1.bin"
    batch = bytes(3073)
    return {
        "is-outside": tar((f"../{first}", tarfile.REGTYPE, batch)),
        "is-absolute": tar((f"/{first}", tarfile.REGTYPE, batch)),
        "is-a-link": tar((first, tarfile.SYMTYPE, b"")),
        "is-a-pipe": tar((first, tarfile.FIFOTYPE, b"")),
        "claims-8-EiB": tar((first, tarfile.REGTYPE, b""), claimed=2**63 - 1),
        "claims-less-than-nothing": tar((first, tarfile.REGTYPE, b""), claimed=-512),
        "claims-1-TiB-elsewhere": tar(("else", tarfile.REGTYPE, b""), claimed=2**40),
        "claims-512-MiB-elsewhere": tar(("else", tarfile.REGTYPE, b""), claimed=2**29),
        "has-a-header-of-digits": tar(("pax", tarfile.XHDTYPE, b"1" * 2**20), (first, tarfile.REGTYPE, b"1")),
        "is-cut": gzip.compress(bytes(range(256)) * 4, mtime=0)[:-9],
        "is-no-tar": gzip.compress(b"no archive" * 100, mtime=0),
        "is-no-gzip": b"\x1f\x8b\x08\x00 and so on",
        "is-empty": b"",
    }


def npy(shape: str, descr: str = "'|u1'", content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(members: dict[str, bytes], method: int) -> bytes:
    """A .zip; the same bytes each time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An .npz."""
    return archive({f"{name}.npy": content for name, content in members.items()}, method)


def arrays() -> dict[str, bytes]:
    image = cifar_files.jpeg(np.zeros((3, 32, 32), np.uint8))
    large = cifar_files.jpeg(np.zeros((3, 800, 800), np.uint8))

    def of(content: bytes) -> dict[str, bytes]:
        return {
            "jpeg": npy(f"({len(content)},)", content=content),
            "length": npy("(1,)", "'<u4'", struct.pack("<I", len(content))),
            "label": npy("(1,)", content=b"\x03"),
        }

    one = of(image)
    million = npy("(1000000,)", content=bytes(10**6))
    two_lengths = struct.pack("<QQ", 2**64 - 1, len(image) + 1)
    whole, bomb = packed(one), packed({**one, "more": bytes(2**20)})
    return {
        "executes": packed({**one, "label": npy("(1,)", "'|O'", pickle.dumps(Evil(), protocol=2))}),
        "claims-64-GiB": packed({**one, "jpeg": npy("(68719476736,)")}),
        "claims-less-than-nothing": packed({**one, "jpeg": npy("(-1,)")}),
        "claims-a-number-of-1-GiB": packed({**one, "label": npy("(1,)", "'|V1073741824'")}),
        "claims-2-GiB-unpacked": bomb.replace(struct.pack("<I", 2**20), struct.pack("<I", 2**31 - 1)),
        "has-a-header-nested-deeply": packed({**one, "label": npy("(" * 4000)}),
        "has-lengths-that-overflow": packed({**one, "length": npy("(2,)", "'<u8'", two_lengths)}),
        "has-a-million-images": packed({"jpeg": npy("(0,)"), "length": million, "label": million}),
        "has-a-large-image": packed(of(large)),
        "has-other-bits": packed(one, zipfile.ZIP_STORED).replace(image[-9:], image[-9:-2] + b"??"),
        "is-cut": whole[: len(whole) // 2],
        "is-empty": b"",
    }


def checkpoint(pickled: bytes, tensor: bytes = bytes(4), method: int = zipfile.ZIP_STORED) -> bytes:
    """As ``torch.save`` lays it out."""
    members = {"data.pkl": pickled, "byteorder": b"little", "data/0": tensor, "version": b"3\n"}
    return archive({f"archive/{name}": content for name, content in members.items()}, method)


def checkpoints() -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save({"state": torch.ones(100), "settings": {}}, file)
    whole, ones = file.getvalue(), torch.ones(2).numpy().tobytes()
    name = b"X%c\0\0\0%s"
    words = [name % (len(word), word) for word in (b"storage", b"0", b"cpu")]
    kept = b"(%sctorch\nFloatStorage\n%s%sJ\xff\xff\xff\x0ftQ" % tuple(words)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(%sK\0K\x08\x85K\x01\x85\x89}tR" % kept
    return {
        "executes": checkpoint(pickle.dumps({"config": Evil()}, protocol=2)),
        "claims-2-GiB-of-nothing": checkpoint(
            b"\x80\x02}%scbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs." % (name % (1, b"a"))
        ),
        "claims-1-GiB-of-numbers": checkpoint(b"\x80\x02}%s%ss." % (name % (1, b"a"), tensor)),
        "claims-64-GiB-of-memo": checkpoint(b"\x80\x02}r\xff\xff\xff\x7f."),
        "hashes-for-ever": checkpoint(DOUBLED),
        "is-nested-deeply": checkpoint(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."),
        "is-packed": checkpoint(b"\x80\x02}.", bytes(2**20), zipfile.ZIP_DEFLATED),
        "has-other-bits": whole.replace(ones, ones[:-1] + b"\x3e", 1),
        "has-no-pickle": archive({"archive/version": b"3\n"}, zipfile.ZIP_STORED),
        "is-a-list": checkpoint(b"\x80\x02]."),
        "is-of-old-pytorch": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2),
        "is-cut": whole[: len(whole) // 2],
        "is-empty": b"",
    }


def texts() -> dict[str, bytes]:
    return {
        "is-nested-deeply": b"[" * 5000,
        "has-a-number-of-9999-digits": b'{"results": ' + b"9" * 9999 + b"}",
        "has-keys-alone": b'{"steps": [{}], "benchmarks": [{"extra_info": {}}], "results": {}}',
        "is-no-number": b'{"steps": NaN, "benchmarks": NaN, "results": NaN}',
        "is-a-list": b"[]",
        "is-null": b"null",
        "is-no-text": b"\xff\xfe{}",
        "has-half-a-character": b'{"steps": "\\ud800", "benchmarks": [{"extra_info": "\\ud800"}]}',
        "is-cut": b'{"results": {"loss": [1.0, 0.',
        "is-empty": b"",
    }


def main() -> None:
    made = {
        "python": pickles(),
        "binary": {"is-cut": bytes(3072), "has-label-10": b"\n" + bytes(3072), "is-empty": b""},
        "archive": archives(),
        "npz": arrays(),
        "checkpoint": checkpoints(),
        "state": checkpoints(),
        "part": texts(),
        "bench": texts(),
        "gpu": texts(),
    }
    for reader, files in made.items():
        (CORPUS / reader).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (CORPUS / reader / name).write_bytes(content)


if __name__ == "__main__":
    main()
