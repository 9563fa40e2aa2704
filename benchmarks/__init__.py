"""Who is how fast: contestants (registry.py), one runner that times only right results (run.py), plots (plot.py)."""
