"""What a user of a trained model needs: reading records, zero-shot scores, export."""
