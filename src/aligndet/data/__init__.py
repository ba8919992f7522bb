"""Images, labels and views."""
