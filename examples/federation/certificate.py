"""Make what a trial of a federation needs: an authority, a certificate of the server that it has signed, and a key for each client.

    python examples/federation/certificate.py keys --host server.example --host 10.0.0.1 --clients 4

writes ``ca.crt`` (for all machines), ``server.crt`` and ``server.key`` (for the server), ``client_<k>.key`` (for client k alone) and
``client_<k>.key.pub`` (which is registered at the server). ``ca.key`` signs; nobody needs it any more. For a federation that lasts, use the
certificates of your organisation. Needs ``openssl`` and ``ssh-keygen``.
"""

import argparse
import ipaddress
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command, and return its output.

    Raises:
        RuntimeError: If the command fails, with its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} has failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def make_certificate(folder: Path, hosts: Sequence[str]) -> None:
    """Make a certificate authority, and a certificate for the names and addresses at which clients reach the server."""
    folder.mkdir(parents=True, exist_ok=True)
    at = {name: str(folder / name) for name in ("ca.key", "ca.crt", "server.key", "server.csr", "server.crt")}
    new = ["openssl", "req", "-newkey", "rsa:3072", "-nodes", "-sha256"]
    run(*new, "-x509", "-days", "30", "-subj", "/CN=trial", "-keyout", at["ca.key"], "-out", at["ca.crt"])
    run(*new, "-subj", f"/CN={hosts[0]}", "-keyout", at["server.key"], "-out", at["server.csr"])
    names = folder / "names.txt"
    names.write_text(f"subjectAltName={','.join(map(_alternative, hosts))}\n")
    signed = ["-CA", at["ca.crt"], "-CAkey", at["ca.key"], "-CAcreateserial", "-days", "30", "-extfile", str(names)]
    run("openssl", "x509", "-req", "-sha256", "-in", at["server.csr"], "-out", at["server.crt"], *signed)


def make_key(path: Path) -> None:
    """Make the key of a client; its public part is in ``<path>.pub``."""
    run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path))


def _alternative(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def main() -> None:
    """Make certificates and keys as given by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--host", action="append", required=True, help="a name or address of the server; may be repeated"
    )
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    if (args.folder / "ca.crt").exists():
        parser.error(f"{args.folder} holds certificates already; choose another folder")
    make_certificate(args.folder, args.host)
    for client in range(args.clients):
        make_key(args.folder / f"client_{client}.key")
    print(f"certificates and {args.clients} keys are in {args.folder}")


if __name__ == "__main__":
    main()
