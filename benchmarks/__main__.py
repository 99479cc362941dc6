"""The command line: ``python -m benchmarks``."""
import argparse, tempfile, statistics, time
from pathlib import Path
import os
import trustme
from .rows import ROWS
from .server import Server
from .client import Client

def main():
    p = argparse.ArgumentParser()
    p.add_argument("--quick", action="store_true")
    p.add_argument("--rounds", type=int)
    p.add_argument("--rows", default="echo64")
    p.add_argument("--peers", default="trio,trisock")
    a = p.parse_args()
    rounds = a.rounds or (3 if a.quick else 5)
    cores = sorted(os.sched_getaffinity(0))
    core, own = cores[0], cores[-1]
    os.sched_setaffinity(0, {own})
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        ca = trustme.CA()
        leaf = ca.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
        ca.cert_pem.write_to_path(d / "ca.pem")
        leaf.private_key_pem.write_to_path(d / "key.pem")
        for blob in leaf.cert_chain_pems: blob.write_to_path(d / "chain.pem", append=True)
        for row in ROWS:
            if row.name not in a.rows.split(","): continue
            rates = {}
            for r in range(rounds):
                for peer in a.peers.split(","):
                    cmd = [f"benchmarks.peers.{peer}", row.work]
                    if row.tls: cmd.append(f"--tls={d}")
                    s = Server(cmd, core)
                    c = Client(s.port(), d / "ca.pem" if row.tls else None)
                    c.open(row.connections)
                    n = row.quick_amount if a.quick else row.amount
                    c.echo(n // 10)
                    b, w = s.cpu_seconds(), time.perf_counter()
                    c.echo(n)
                    e, w2 = s.cpu_seconds(), time.perf_counter()
                    s.stop(); c.close()
                    rates.setdefault(peer, []).append(n / (e - b))
                    print(row.name, peer, f"{n/(e-b):.0f}/cpu s, {n/(w2-w):.0f}/s", flush=True)
            for peer in rates:
                print(row.name, peer, f"{statistics.median(rates[peer]):.0f}/cpu s  x{statistics.median(x/y for x,y in zip(rates[peer], rates['trio'])):.2f}")
main()
