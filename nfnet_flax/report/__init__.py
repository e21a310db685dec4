"""`nfnet report`: what a run did with its time, and how it went, on one page."""
