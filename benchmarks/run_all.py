"""`make bench`: every benchmark in a short form, one after the other. Some minutes on two cores.

For figures worth recording run each script by itself, on an idle machine, with more repeats; see benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from make_checkpoint import default_dir
from startup import DEMO_CONFIG, MOESAIC, bench_config

from serving.config import load_config

HERE = Path(__file__).parent
TIMEOUT_S = 1200.0


def run(script: str, *arguments: str) -> dict[str, object]:
    """Return one benchmark's last line; what else it prints is shown as it comes."""
    print(f"\n== {script} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(HERE / script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
        code = process.wait(TIMEOUT_S)
    if code != 0:
        print(last, end="")
        return {"benchmark": script, "failed": code}
    result: dict[str, object] = json.loads(last)
    return result


def run_load(options: argparse.Namespace) -> dict[str, object]:
    """Run open-loop load on the demo, started for it and stopped again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_path = bench_config(folder, argparse.Namespace(config=DEMO_CONFIG))
        subprocess.run([MOESAIC, "up", config_path, "--state-dir", folder], check=True, timeout=TIMEOUT_S)
        try:
            return run("load.py", "--url", f"http://127.0.0.1:{load_config(config_path).http_port}", "--rate", "1",
                       "--duration-s", str(options.load_s), "--output-tokens", "32")
        finally:
            subprocess.run([MOESAIC, "down", "--state-dir", folder], check=True, timeout=TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-s", type=float, default=20.0)
    options = parser.parse_args()
    results = [
        run("make_checkpoint.py", "small"),
        run("engine.py", "--model", str(default_dir("small")), "--compare", "transformers", "--repeats", "1",
            "--output-tokens", "32", "--prefill-turns", "1"),
        run("dispatch.py", "--members", "2", "--rows", "1,512"),
        run("placement.py", "--instances", "20"),
        run("startup.py", "--repeats", "1"),
        run("switch.py", "--changes", "2"),
        run("bodies.py", "--only", "usual,prompt:,accepted"),
        run_load(options),
    ]
    print()
    print(json.dumps({"benchmark": "all", "results": results}))


if __name__ == "__main__":
    main()
