"""What makes a step fast, each beside a plain twin: attention over a pack, the scoring head, the trimmed last layer."""
