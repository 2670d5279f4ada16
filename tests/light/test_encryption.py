"""The format of encrypted files: what was written comes out, whatever else does not."""

from __future__ import annotations

import hashlib
import hmac
from itertools import combinations, pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fedselect import Mask, encryption
from fedselect.encryption import FRAME, HEAD, SEALED, TAG, DecryptionError, Encryptor, Frames

PAIRS = list(combinations(range(10), 2))
KEY, OTHER, SALT, NAME = bytes(range(32)), bytes(32), b"s" * 32, "masks/a/b.enc"
SIZES = [0, 1, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 2 * FRAME + 17]


def bytes_of(size):
    return hashlib.shake_128(str(size).encode()).digest(size)


def keys(key=KEY, name=NAME):
    return {encryption.key_id(key): encryption.file_key(key, name)}


def made(data, **changes):
    return encryption.encrypt(data, **{"key": KEY, "salt": SALT, "name": NAME, **changes})


@pytest.mark.parametrize("size", SIZES)
def test_what_was_encrypted_comes_out_and_has_its_size(size):
    data = bytes_of(size)
    file = made(data)
    assert encryption.decrypt(file, keys()) == data
    assert len(file) == encryption.encrypted_size(size)
    assert encryption.plain_size(len(file)) == size
    assert size < 16 or data[:16] not in file


@given(st.binary(max_size=300), st.lists(st.integers(0, 70_000), max_size=6))
def test_pieces_make_the_same_file(seed, cuts):
    data = hashlib.shake_128(seed).digest(2 * FRAME + len(seed))
    encryptor, places = Encryptor(KEY, SALT, NAME), [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(places)]
    assert b"".join(map(encryptor.update, pieces)) + encryptor.finish() == made(data)


def test_the_format_is_what_its_page_says():
    """By other means: HKDF from two HMACs (RFC 5869), nonces by hand."""

    def hkdf(key, salt, info):
        extracted = hmac.digest(salt or bytes(32), key, hashlib.sha256)
        return hmac.digest(extracted, info + b"\1", hashlib.sha256)

    data = bytes_of(FRAME + 5)
    whole = hkdf(KEY, b"", b"fedselect-encrypted/1\0" + NAME.encode())
    cipher = AESGCM(hkdf(whole, SALT, b"fedselect-encrypted/1 frames"))
    name = hashlib.sha256(b"fedselect-encrypted/1 key id\0" + KEY).digest()[:8]
    head = b"FSENC1\r\n" + name + SALT
    first = cipher.encrypt(bytes(12), data[:FRAME], None)
    last = cipher.encrypt(bytes(10) + b"\1\1", data[FRAME:], None)
    assert made(data) == head + first + last


@pytest.mark.parametrize("size", [0, 17, FRAME, 2 * FRAME + 17])
def test_a_file_that_was_changed_cut_or_moved_is_refused(size):
    file = made(bytes_of(size))
    flips = [*range(0, HEAD, 7), HEAD, len(file) // 2, len(file) - 1]
    wrong = [file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :] for at in flips if at < len(file)]
    wrong += [file[:-1], file[:HEAD], file[:5], b"", file + b"x", file + file[HEAD:]]
    if size > FRAME:
        frames = [file[at : at + SEALED] for at in range(HEAD, len(file), SEALED)]
        wrong += [file[:HEAD] + b"".join(frames[:-1])]
        wrong += [file[:HEAD] + frames[1] + frames[0] + b"".join(frames[2:])]
    for each in wrong:
        with pytest.raises(DecryptionError):
            encryption.decrypt(each, keys())
    for others in (keys(OTHER), keys(name="masks/a/c.enc"), {}):
        with pytest.raises(DecryptionError):
            encryption.decrypt(file, others)


@pytest.mark.parametrize("length", [1, 100, FRAME, FRAME + 1])
def test_any_range_is_read_alone(length):
    data = bytes_of(3 * FRAME + 100)
    file = made(data)
    head, (file_key,) = encryption.read_head(file), keys().values()
    for start in (0, 1, FRAME - 1, FRAME, FRAME + 50, 2 * FRAME, 3 * FRAME, len(data) - 1):
        where = encryption.span(start, length)
        stored = file[where.start : where.start + where.length]
        frames = Frames(file_key, head, where.first)
        plain = b"".join(frames.open(stored, ends=len(stored) < where.length))
        assert plain[where.skip : where.skip + length] == data[start : start + length]


def test_two_files_of_the_same_bytes_have_nothing_in_common():
    data = bytes_of(1000)
    one, two = made(data), made(data, salt=b"t" * 32)
    assert one[HEAD:] != two[HEAD:]
    assert encryption.file_key(KEY, NAME) != encryption.file_key(KEY, NAME + "x")
    with pytest.raises(ValueError, match="31 bytes"):
        made(data, salt=b"s" * 31)


def test_the_digest_of_one_of_few_masks_can_be_found():
    """What docs/PRIVACY.md does not promise: two of ten rows are 45 masks, and all are tried."""
    rows, wide = 10, 8
    choices = [Mask.from_bool(np.repeat([r in two for r in range(rows)], wide)) for two in PAIRS]
    digest = choices[17].digest
    assert [n for n, each in enumerate(choices) if each.digest == digest] == [17]
    assert len(choices) == 45


def test_no_encrypted_file_has_such_a_size():
    assert [encryption.plain_size(n) for n in (0, 10, HEAD, HEAD + TAG)] == [0, 0, 0, 0]
