"""Tables of results written before the harness. This file goes when those are measured anew."""

from __future__ import annotations

from .tables import load, machine, markdown

EARLIER = "By an earlier script"


def planning() -> str:
    """Planning times."""
    result = load("planning.json")
    rows = [
        [name, f"{case['median_s'] * 1e3:.0f}", f"{case['p20_s'] * 1e3:.0f} - {case['p80_s'] * 1e3:.0f}"]
        for name, case in result["results"].items()
    ]
    table = markdown(rows, ["plan", "median, ms", "20 - 80 %"])
    return f"{table}\n\n{EARLIER} (`{result['command']}`): {result['repeats']} repeats, {machine(result)}."


def cpu_rotary() -> str:
    """The rotary step on a CPU."""
    result = load("cpu_rotary.json")
    rows = []
    for name, case in result["results"].items():
        seconds = case["seconds"]
        rows.append(
            [
                name,
                *(
                    f"{seconds[p] * 1e3:.0f}"
                    for p in ("ours, in place", "pass", "ours", "torch.compile", "Hugging Face")
                ),
                *(f"{case[r]:.2f}" for r in ("pass / ours",)),
                *(f"{case[r]:.1f}" for r in ("torch.compile / ours", "Hugging Face / ours")),
            ]
        )
    headers = [
        "",
        "in place, ms",
        "memory pass",
        "new tensors",
        "torch.compile",
        "Hugging Face",
        "pass / in place",
        "torch.compile / in place",
        "Hugging Face / in place",
    ]
    built = result["built"]["CPU library"].removeprefix("yes, ")
    return (
        f"{markdown(rows, headers)}\n\n{EARLIER} (`{result['command']}`), before heads were prefetched: "
        f"medians of {result['repeats']} interleaved repeats, {machine(result)}; {built}."
    )


TABLES = {"planning": planning, "cpu_rotary": cpu_rotary}
