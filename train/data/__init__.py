"""The data of a run: documents, their tokens, and rows and batches cut from them."""
