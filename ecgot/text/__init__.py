"""Report text: cleaning, plain English, statements, phrases, and the labels that a report states."""
