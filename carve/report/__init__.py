"""Reports of a conversion: text, one offline HTML file, and two conversions side by side."""

from carve.report.text import bench_table, figures, gate_table, pass_table, render, table

__all__ = ["bench_table", "figures", "gate_table", "pass_table", "render", "table"]
