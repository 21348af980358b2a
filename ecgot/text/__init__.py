"""Report text: cleaned, in plain English, split into statements and phrases, and the labels it states."""
