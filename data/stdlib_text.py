"""`stdlib_text`: the source text of Python's standard library, byte by byte (vocabulary 256).

A fixed list of modules, pure Python and present in every build of CPython 3.12, read from the interpreter
that runs this. Not listed: what distributions patch or leave out (`site`, `sysconfig`, tkinter, idlelib,
...). The bytes differ a little between patch versions of Python, so the sha256 of both splits stands in
`Dataset.info`, and with it in the rows.
"""

import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import require

TRAIN = """
    __future__ _collections_abc _compat_pickle _compression _markupbase _py_abc _pydatetime _pydecimal _pyio
    _pylong _strptime _threading_local _weakrefset abc aifc ast base64 bdb bz2 cProfile cgi cgitb chunk cmd
    code codecs codeop colorsys compileall configparser contextlib copy copyreg crypt dataclasses dis
    doctest enum filecmp fileinput fnmatch ftplib functools genericpath getopt getpass gettext glob graphlib
    gzip hashlib hmac imaplib imghdr inspect io ipaddress linecache locale lzma mailbox mailcap mimetypes
    modulefinder netrc nntplib ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle
    pickletools pipes pkgutil platform plistlib poplib posixpath profile pstats pty py_compile pyclbr pydoc
    queue quopri random reprlib rlcompleter runpy selectors shelve shutil signal smtplib sndhdr socket
    socketserver ssl stat string stringprep subprocess sunau symtable tabnanny telnetlib tempfile threading
    timeit token trace tracemalloc tty turtle types typing uu uuid warnings wave weakref webbrowser xdrlib
    zipimport
"""
TEST = """ argparse bisect calendar csv difflib fractions heapq pprint sched shlex statistics tarfile textwrap
 tokenize traceback zipapp
"""
TRAIN_MODULES, TEST_MODULES = tuple(TRAIN.split()), tuple(TEST.split())


def stdlib_text(*, length: int = 256, test_size: int = 0) -> Content:
    """Windows of T = length bytes; labels are the inputs shifted by one; every position scores.

    The modules are joined by one zero byte and cut into windows that follow one another: each byte but the
    first is a label once, and the last, incomplete window is dropped. Test: modules that are not in the
    training text; the first `test_size` of its windows, or all (0).
    """
    require(length >= 1, f"stdlib_text: length must be at least 1, got {length}")
    require(test_size >= 0, f"stdlib_text: test_size must be at least 1, or 0: all windows, got {test_size}")
    texts = {split: module_bytes(modules) for split, modules in (("train", TRAIN_MODULES), ("test", TEST_MODULES))}
    for split, text in texts.items():
        require(
            len(text) > length,
            f"stdlib_text: length={length} is longer than the {split} text ({len(text)} bytes)",
        )
    info = {"vocab_size": 256, "chance": 1 / 256, "python": platform.python_version()}
    for split, text in texts.items():
        info[f"{split}_bytes"] = len(text)
        info[f"{split}_sha256"] = hashlib.sha256(text).hexdigest()
    info["sha256"] = hashlib.sha256(texts["train"] + texts["test"]).hexdigest()
    return Content(
        kind="tokens",
        train={"text": windows(texts["train"], length)},
        test={"text": windows(texts["test"], length)[: test_size or None]},
        info=info,
    )


def module_bytes(names: tuple[str, ...]) -> bytes:
    """The source of the modules, in the given order, joined by one zero byte."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in names]
    missing = [file.stem for file in files if not file.is_file()]
    require(
        not missing,
        f"stdlib_text needs the standard library's sources, and {folder} lacks {', '.join(missing[:5])}; "
        "install a complete CPython 3.12",
    )
    return b"\0".join(file.read_bytes() for file in files)


def windows(text: bytes, length: int) -> np.ndarray:
    """uint8 [N, length + 1]: consecutive windows; the last byte of one is the first of the next."""
    array = np.frombuffer(text, np.uint8)
    count = (len(array) - 1) // length
    return array[np.arange(count)[:, None] * length + np.arange(length + 1)]


def facts() -> dict[str, str]:
    """What the text depends on besides its settings."""
    return {"python": platform.python_version()}
