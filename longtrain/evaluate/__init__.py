"""Looking at a run: held-out loss, plots, generated text, export."""
