"""One script a question; dated answers in `results/`."""
