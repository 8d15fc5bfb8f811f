"""Runs the services of deploy/compose as compose would, without containers, and one small `tokenize` on them.

`python -m tests.deploy.compose_lab FOLDER TOKENIZER SHARDS` must run in namespaces of its own (network, mounts,
processes), so that the host names and ports of compose.yaml can be used as they are. Ends with the exit code of
`tokenmill verify`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parent.parent.parent / "deploy/compose/compose.yaml"
# two Ray nodes on one machine cannot both use the default ports; containers can
OWN_PORTS = {"worker": ["--dashboard-agent-listen-port=0", "--num-cpus=2"]}
START_S = 240


def services(secrets: dict[str, str]) -> dict[str, Any]:
    """compose.yaml with the variables ${NAME...} filled in."""
    text = re.sub(r"\$\{(\w+)[^}]*\}", lambda match: secrets.get(match[1], "unset"), COMPOSE.read_text())
    return yaml.safe_load(text)


def start(compose: dict[str, Any], name: str, folder: Path) -> subprocess.Popen:
    service = compose["services"][name]
    command = [*service.get("entrypoint", []), *service["command"], *OWN_PORTS.get(name, [])]
    for config in service.get("configs", []):
        (folder / config["source"]).write_text(compose["configs"][config["source"]]["content"])
        command = [word.replace(config["target"], str(folder / config["source"])) for word in command]
    (folder / "data").mkdir(exist_ok=True)
    command = [word.replace("-dir=/data", f"-dir={folder}/data") for word in command]
    print("starts", *command, flush=True)
    return subprocess.Popen(command, env={**os.environ, **service.get("environment", {})})


def until(command: list[str], what: str, environment: dict[str, str]) -> None:
    """Repeats the command, as compose repeats a health check, until it succeeds."""
    deadline = time.monotonic() + START_S
    while subprocess.run(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL).returncode:
        assert time.monotonic() < deadline, f"{what}: not ready within {START_S} s"
        time.sleep(1)


def main(folder: Path, tokenizer: str, shards: str) -> int:
    compose = services({"RAY_AUTH_TOKEN": "a" * 64, "S3_SECRET": "b" * 64})
    own = compose["services"]["head"]["environment"]
    for name in ("storage", "head", "worker"):
        process = start(compose, name, folder)
        until(compose["services"][name]["healthcheck"]["test"][1:], f"the health check of {name}", own)
        assert process.poll() is None, f"{name} ended"
    metrics = Path(compose["services"]["prometheus"]["command"][0].split("=")[1])
    assert "prom_metrics_service_discovery" in metrics.read_text()
    provisioning = Path(compose["services"]["grafana"]["environment"]["GF_PATHS_PROVISIONING"])
    assert list(provisioning.rglob("*.yml")), "Grafana would find no data source"
    environment = {**os.environ, **own, "RAY_ADDRESS": "head:6379"}
    program = [sys.executable, "-m", "tokenmill"]
    settings = [f"data.shards={shards}", f"tokenizer={tokenizer}", "output=s3://corpus/tokens"]
    tokenized = subprocess.run([*program, "tokenize", *settings, "workers.wait_s=120"], env=environment)
    return tokenized.returncode or subprocess.run([*program, "verify", settings[2]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
