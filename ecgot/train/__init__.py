"""Training: alignment (stage 1), report generation (stage 2), and supervised classifiers."""
