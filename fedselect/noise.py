"""Noise that an auditor can compute again and nobody else can know: keys and normal draws.

Owns how a round's key comes from the coordinator's secret, and the Gaussian noise that follows from
it, in whole steps of a grid. Must not decide how much noise there is.

A secret of 32 bytes from the operating system's generator is kept outside the database. Each run's
secret is derived from it and committed to by hash; each round's key from that and the manifest, so
that no two manifests share noise. All arithmetic is of operations that IEEE 754 rounds correctly
(+, −, ×, ÷, √): the draws are the same bits on every machine, which a library's log would not be.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedselect.masks import BLOCK

Float64Vector = npt.NDArray[np.float64]
KEY = 32  # bytes
DOMAIN = b"fedselect-noise/1"


# --- keys --------------------------------------------------------------------------------------


def run_secret(master: bytes, run: str) -> bytes:
    """A run's 32 bytes from the coordinator's; one says nothing of another's."""
    return _derived(master, b"run " + run.encode())


def commitment(secret: bytes) -> str:
    """SHA-256 (hex) that binds a run to its secret, and tells nothing of it."""
    return hashlib.sha256(DOMAIN + b" commitment " + secret).hexdigest()


def round_key(secret: bytes, manifest: str) -> bytes:
    """The key of the round whose manifest has this SHA-256 (hex)."""
    return _derived(secret, b"round " + manifest.encode())


def _derived(secret: bytes, info: bytes) -> bytes:
    if len(secret) != KEY:
        raise ValueError(f"a secret has {KEY} bytes, not {len(secret)}")
    return HKDF(SHA256(), KEY, salt=DOMAIN, info=info).derive(secret)


# --- draws -------------------------------------------------------------------------------------


def gaussian(key: bytes, start: int, stop: int, sigma: int) -> Float64Vector:
    """Noise of the elements [start, stop): whole numbers, normal with deviation ``sigma``.

    Any range gives what a larger one has there. A draw is the normal quantile of 128 bits of
    ChaCha20, so that tails reach 13 deviations, times ``sigma``, rounded to a whole number.
    """
    found = np.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        begin, end = max(start, first), min(stop, first + BLOCK)
        found[begin - start : end - start] = _block(key, block, end - first)[begin - first :]
    return np.rint(found * sigma)


def _block(key: bytes, block: int, count: int) -> Float64Vector:
    nonce = bytes(8) + block.to_bytes(8, "little")  # 8 bytes count 64-byte pieces of the stream
    stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(16 * count))
    high, low = np.frombuffer(stream, dtype="<u8").reshape(-1, 2).T
    tail = (high.astype(np.float64) + (low | np.uint64(1)).astype(np.float64) * 2.0**-64) * 2.0**-65
    sign = 1.0 - 2.0 * (low & np.uint64(1)).astype(np.float64)
    return sign * upper_quantile(tail)


# Coefficients of Wichura's algorithm AS 241 (PPND16), Applied Statistics 37 (1988), 477-484: the
# normal quantile to about 16 digits. The standard library's ``NormalDist.inv_cdf`` is the same.
_CENTRE = (
    (
        *(2509.0809287301226727, 33430.575583588128105, 67265.770927008700853),
        *(45921.953931549871457, 13731.693765509461125, 1971.5909503065514427),
        *(133.14166789178437745, 3.387132872796366608),
    ),
    (
        *(5226.495278852854561, 28729.085735721942674, 39307.89580009271061),
        *(21213.794301586595867, 5394.1960214247511077, 687.1870074920579083),
        *(42.313330701600911252, 1.0),
    ),
)
_NEAR = (
    (
        *(7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177),
        *(1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055),
        *(4.6303378461565452959, 1.42343711074968357734),
    ),
    (
        *(1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966),
        *(0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494),
        *(2.05319162663775882187, 1.0),
    ),
)
_FAR = (
    (
        *(2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386),
        *(0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358),
        *(5.4637849111641143699, 6.6579046435011037772),
    ),
    (
        *(2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5),
        *(7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531),
        *(0.59983220655588793769, 1.0),
    ),
)


def upper_quantile(tail: Float64Vector) -> Float64Vector:
    """The x ≥ 0 that a normal variable exceeds with the chance ``tail``, of (0, 0.5]."""
    from_middle = 0.5 - tail
    found = from_middle * _ratio(_CENTRE, 0.180625 - from_middle * from_middle)
    outer = np.flatnonzero(from_middle > 0.425)
    depth = np.sqrt(-_log(tail[outer]))
    near = _ratio(_NEAR, depth - 1.6)
    far = _ratio(_FAR, depth - 5.0)
    found[outer] = np.where(depth <= 5.0, near, far)
    return found


def _ratio(coefficients: tuple[tuple[float, ...], ...], x: Float64Vector) -> Float64Vector:
    above, below = (_horner(each, x) for each in coefficients)
    return above / below


def _horner(coefficients: tuple[float, ...], x: Float64Vector) -> Float64Vector:
    found = np.full_like(x, coefficients[0])
    for each in coefficients[1:]:
        found = found * x + each
    return found


_LN2 = 0.6931471805599453
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(13, -1, -1))


def _log(x: Float64Vector) -> Float64Vector:
    """The natural logarithm, of the same bits everywhere: log m + e·log 2 with 2·atanh for m."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    exponent = exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LN2 + 2.0 * s * _horner(_ATANH, s * s)
