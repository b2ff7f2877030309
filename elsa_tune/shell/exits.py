"""Exit statuses, as docs/how-to/when-something-is-wrong.md promises them."""

EXIT_INCOMPLETE, EXIT_MISTAKE, EXIT_UNEXPECTED, EXIT_INTERRUPTED = 1, 2, 70, 130
"""Something is missing from what was asked; a mistake that a sentence names; a fault of ours; Ctrl-C. Other signals are 128 and their
number."""
