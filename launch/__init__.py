"""Starting jobs: renders text, then submits it. No torch here."""
