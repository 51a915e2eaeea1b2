"""Reading and writing what an artifact holds as constants; one module per format."""
