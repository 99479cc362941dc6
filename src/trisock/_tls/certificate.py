"""Certificate: a chain and its private key, checked before a byte is sent.

We load exactly the bytes that we have checked: ``pem`` parses the input once and encodes it again,
and OpenSSL gets only the result. No error quotes the input, which may be a key.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import os
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeVar

from .._arguments import type_name
from .._text import printable
from . import pem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

T = TypeVar("T")


def set_field(instance: object, name: str, value: object) -> None:
    object.__setattr__(instance, name, value)  # plain assignment fails: the object is immutable


class Certificate:
    """A certificate chain and its private key, checked to match.

    Args:
      chain: the certificates in PEM. The first one is the server's (or client's) own certificate.
      private_key: the key of the first certificate, in PEM: RSA, ECDSA, Ed25519 or Ed448. It may be
        encrypted.
      password: the password of an encrypted key.

    Raises:
      ValueError: an argument is not PEM, a certificate or the key cannot be read, the key does not
        match the first certificate, or the key is encrypted and the password is missing or wrong
        (there is never a prompt). The message names the argument and quotes nothing.
      TypeError: an argument is neither ``str`` nor ``bytes``.
      OSError: no file can be created for OpenSSL, which reads certificates from files only.

    Anything outside the PEM blocks is ignored. Each certificate is sent once, in the order given.
    ``Certificate`` objects are immutable, compare by value, and never show their key. A copy is the
    same object, and pickling raises ``TypeError``. A server selects a certificate by its DNS names.
    If a certificate has no DNS names, the server uses its common name. (But many clients, including
    ``ClientTLS``, refuse a certificate without DNS names: RFC 9525, section 2.)
    """

    __slots__ = ("_chain", "_files", "_password", "_private_key", "key_kind", "names", "not_after")

    #: The names that the certificate is valid for, in lower case; wildcards as ``*.example.org``.
    names: tuple[str, ...]
    #: The type of the key, such as ``"RSA"``. A client decides which key types it accepts.
    key_kind: str
    #: The end of the first certificate's validity, in UTC. Others in the chain may expire earlier.
    not_after: datetime.datetime
    _chain: bytes
    _private_key: bytes
    _password: bytes | None
    #: The paths from ``from_files``: the chain's, and the key's (``None``: the same file).
    _files: tuple[str, str | None] | None

    # Invariant: OpenSSL has accepted _chain with _private_key. Both are PEM that ``pem`` has
    # written.

    def __init__(
        self, chain: str | bytes, private_key: str | bytes, password: str | bytes | None = None
    ) -> None:
        from . import x509

        set_field(self, "_files", None)
        chain_pem = pem_argument(chain, "chain")
        key_pem = pem_argument(private_key, "private_key")
        set_field(self, "_password", None if password is None else _password_argument(password))
        ders = as_value_error("chain is not a PEM certificate", lambda: pem.certificates(chain_pem))
        set_field(self, "_chain", pem.encode_certificates(ders))
        leaf = as_value_error("chain is not a certificate", lambda: x509.load_certificate(ders[0]))
        set_field(
            self,
            "names",
            as_value_error("chain: the names cannot be read", lambda: x509.names_of(leaf)),
        )
        end = as_value_error("chain: its dates cannot be read", lambda: leaf.not_valid_after_utc)
        set_field(self, "not_after", end)
        public_key = as_value_error(
            "chain: the public key cannot be read", lambda: x509.public_bytes(leaf.public_key())
        )
        key_pem = as_value_error(
            "private_key is not a PEM private key", lambda: pem.private_key(key_pem)
        )
        set_field(self, "_private_key", key_pem)
        key = _load_key(self._private_key, self._password)
        if public_key != as_value_error(
            "private_key cannot be used", lambda: x509.public_bytes(key.public_key())
        ):
            raise ValueError(
                "private_key does not match the first certificate of the chain, "
                f"which is for {listed(self.names) or 'no name'}"
            )
        kind = x509.kind_of(key, leaf, public_key)
        if kind is None:
            raise ValueError("private_key is of a type that TLS does not support")
        set_field(self, "key_kind", kind)
        # Accept small keys here. Our own contexts refuse them later; a user's context may allow
        # them.
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.set_ciphers("DEFAULT:@SECLEVEL=0")
        self.load_into(trial)

    @classmethod
    def from_files(
        cls,
        chain: str | os.PathLike[str],
        private_key: str | os.PathLike[str] | None = None,
        password: str | bytes | None = None,
    ) -> Certificate:
        """Read a certificate and its key from two PEM files, or from one file that holds both.

        ``ServerTLS.reload`` reads the files again, by their absolute paths. (So it works after a
        ``chdir``, but not after a ``chroot``.)

        Raises ``OSError`` if a file cannot be read, and all errors of ``Certificate()``.
        """
        chain_pem = key_pem = read_file(chain, "chain")
        if private_key is not None:
            key_pem = read_file(private_key, "private_key")
        try:
            certificate = cls(chain_pem, key_pem, password)
        except ValueError as exc:
            key = "" if private_key is None else f" and {os.fsdecode(private_key)}"
            raise ValueError(f"{exc} (in {os.fsdecode(chain)}{key})") from None
        key_path = None if private_key is None else os.path.abspath(os.fsdecode(private_key))
        set_field(certificate, "_files", (os.path.abspath(os.fsdecode(chain)), key_path))
        return certificate

    def reread(self) -> Certificate:
        """Read the files of ``from_files`` again. Without files, return the same certificate.

        If nothing has changed, the result is equal to this certificate. Raises all errors of
        ``from_files``.
        """
        if self._files is None:
            return self
        return Certificate.from_files(*self._files, self._password)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load this certificate into an ``ssl.SSLContext``. Any other type raises ``TypeError``."""
        if not isinstance(context, ssl.SSLContext):
            raise TypeError(f"context must be an ssl.SSLContext, not {type_name(context)}")

        def get_password() -> bytes:
            # Without a callback OpenSSL would prompt on the terminal, and block the event loop.
            return self._password or b""

        with _private_file(self._chain) as chain, _private_file(self._private_key) as key:
            try:
                context.load_cert_chain(chain, key, password=get_password)
            except ssl.SSLError as exc:
                raise ValueError(
                    "chain or private_key: OpenSSL does not accept the certificate for "
                    f"{listed(self.names) or 'no name'}: {exc}"
                ) from exc

    def __repr__(self) -> str:
        return f"<trisock.Certificate {listed(self.names) or 'without a name'} ({self.key_kind})>"

    def _value(self) -> tuple[bytes, bytes, bytes | None]:
        return (self._chain, self._private_key, self._password)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a trisock.Certificate cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a trisock.Certificate cannot be changed")

    def __copy__(self) -> Certificate:
        return self

    def __deepcopy__(self, memo: object) -> Certificate:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a trisock.Certificate cannot be pickled, nor can an object that contains one: the "
            "pickle would show its private key. Where the certificate is needed, read its files "
            "again (Certificate.from_files)."
        )


CertificateLike = Certificate | Mapping[str, str | bytes]


def to_certificate(value: object) -> Certificate:
    """Return a Certificate unchanged, or make one from a mapping of its fields."""
    if isinstance(value, Certificate):
        return value
    if isinstance(value, Mapping):
        unknown = set(value) - {"chain", "private_key", "password"}
        missing = {"chain", "private_key"} - set(value)
        if unknown or missing:
            # Do not show the names of unknown fields: one of them may be a key.
            faults = [f"it lacks {listed(sorted(missing))}"] if missing else []
            faults += ["it has other fields"] if unknown else []
            raise ValueError(
                "a certificate needs the fields chain and private_key, and may have the field "
                f"password: {' and '.join(faults)}"
            )
        password = value.get("password")
        return _certificate(
            _to_bytes(value["chain"], "chain"),
            _to_bytes(value["private_key"], "private_key"),
            None if password is None else _password_argument(password),
        )
    found = type_name(value)
    raise TypeError(f"a certificate must be a trisock.Certificate or a mapping, not {found}")


@functools.lru_cache(maxsize=32)
def _certificate(chain: bytes, private_key: bytes, password: bytes | None) -> Certificate:
    # Checking an RSA key takes milliseconds: too long to do for each connection.
    return Certificate(chain, private_key, password)


def _to_bytes(value: object, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode(errors="replace")  # PEM blocks are ASCII, so they do not change
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"{what} must be str or bytes, not {type_name(value)}")


def _password_argument(value: object) -> bytes:
    if not isinstance(value, str):
        return _to_bytes(value, "password")
    with contextlib.suppress(UnicodeEncodeError):  # the error would quote the password
        return value.encode(errors="surrogateescape")  # restores undecodable bytes of os.environ
    raise ValueError("password has characters that cannot be encoded")


def pem_argument(value: object, what: str) -> bytes:
    data = _to_bytes(value, what)
    if b"-----BEGIN " not in data:
        raise ValueError(f"{what} is not PEM: it has no '-----BEGIN' line")
    return data


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """Return a file's content. An error shows the path, unless the path itself may be a key."""
    name = os.fsdecode(path)
    if not name.isprintable() or "-----BEGIN" in name:
        raise ValueError(f"{what} must be a path here; pass PEM to Certificate() instead")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise
        raise OSError(exc.errno, f"{what}: {exc.strerror} ({len(name)} characters)") from None


def as_value_error(problem: str, function: Callable[[], T]) -> T:
    """Call a parser of certificates or keys. Any exception becomes a ``ValueError``.

    ``cryptography`` raises errors of many types and, under ``-W error``, also warnings.
    """
    try:
        return function()
    except Exception as exc:
        raise ValueError(f"{problem}: {_redacted(exc)}") from None


def _load_key(pem: bytes, password: bytes | None) -> PrivateKeyTypes:
    from . import x509

    try:
        return x509.load_key(pem, password)
    except TypeError:  # the password is missing, or not needed
        if password is None:
            raise ValueError("private_key is encrypted, and no password was given") from None
        return _load_key(pem, None)  # like OpenSSL, ignore an unneeded password
    except Exception as exc:  # including warnings, under -W error
        hint = "" if password is None else ", or the password is wrong"
        raise ValueError(f"private_key is not a PEM private key{hint}: {_redacted(exc)}") from None


def _redacted(exc: Exception) -> str:
    # Drop quoted text. If a BEGIN line has lost its dashes, the parser mistakes the whole key for
    # the label of a PEM block, and quotes the key: MismatchedTags("PRIVATE KEY\nMIIE...", ...).
    return printable(str(exc).partition('("')[0]) or type(exc).__name__


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


@contextlib.contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file with this content. (OpenSSL reads only files.)

    On Linux with ``/proc`` the file is in memory, and has no name in any directory. Elsewhere it is
    a temporary file, which no other user can read.
    """
    descriptor = _memory_file()
    if descriptor is not None:
        path, named = f"/proc/self/fd/{descriptor}", False
    else:
        try:
            descriptor, path = tempfile.mkstemp(prefix="trisock-")
        except OSError as exc:
            raise OSError(
                exc.errno,
                "OpenSSL reads certificates from files only. Neither a memory file (which needs "
                f"memfd_create and /proc) nor a temporary file can be created: {exc}",
            ) from exc
        named = True
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield path
    finally:
        if named:
            os.unlink(path)


def _memory_file() -> int | None:
    """Return the descriptor of a memory file, or ``None`` if the system cannot provide one."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return None
    try:
        descriptor = os.memfd_create("trisock", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # an old C library lacks it, or seccomp forbids it
        return None
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:  # such as in a chroot without /proc
        os.close(descriptor)
        return None
    return descriptor
