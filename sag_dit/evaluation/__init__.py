"""Numbers one can publish: features, metrics, references, and the suite that joins them."""
