"""A plan as text."""

from __future__ import annotations

from typing import Any

from carve.placement.table import memory_table, value_line
from carve.report.text import table


def plan_text(plan: dict[str, Any]) -> str:
    """What a conversion will take, step by step; where experts would go, if devices are given."""
    lines = []
    if "steps" in plan:
        asked = (
            f"budget {plan['budget']}"
            if plan["ffn_active"] is None
            else f"FFN active {plan['ffn_active']}"
        )
        tokens = plan["tokens"]
        lines += [
            f"{plan['parameters'] / 1e6:.1f} M parameters, {plan['macs'] / 1e6:.1f} M "
            f"multiply-accumulates a token in the blocks; {asked}; "
            f"{tokens['calibration']} calibration tokens",
            "",
        ]
        rows = [["step", "seconds"]]
        rows += [[s["name"], f"{s['seconds']:.0f}"] for s in plan["steps"]]
        rows.append(["in all", f"{plan['seconds']:.0f}"])
        shown = table(rows).splitlines()
        does = ["", "", *(s["does"] for s in plan["steps"]), ""]
        lines += [f"{a}  {b}".rstrip() for a, b in zip(shown, does, strict=True)]
        lines += [
            "",
            f"{_minutes(plan['seconds'])} with {plan['threads']} threads if nothing else runs",
            f"memory at the peak {plan['peak_memory'] / 1e9:.2f} GB, "
            f"{plan['memory_free'] / 1e9:.2f} GB free",
            f"disk {plan['disk'] / 1e6:.0f} MB: artifact {plan['output'] / 1e6:.0f}, "
            f"state until it is finished {plan['state'] / 1e6:.0f}; "
            f"{plan['disk_free'] / 1e6:.0f} MB free",
            "it fits" if plan["feasible"] else "it does not fit: " + "; ".join(plan["reasons"]),
        ]
    if "placement" in plan:
        p = plan["placement"]
        lines += ["", value_line(p["objective"], p["value"], p["bound"], p["gap"])]
        lines.append(memory_table(plan["memory"]))
    return "\n".join(lines).strip("\n")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
