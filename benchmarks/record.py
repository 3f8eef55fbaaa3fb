"""Where the benchmarks of linears, models and the host write their results."""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any


def write(path: Path, script: str, argv: list[str] | None, device: str, results: dict[str, Any]) -> None:
    """A JSON file with the day, the device and its versions, the command, and the results."""
    command = " ".join([f"benchmarks/{script}", *(argv or sys.argv[1:])])
    head = {"date": str(date.today()), "device": device, "command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
