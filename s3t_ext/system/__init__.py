"""The roof over books and numerics: configuration, ingest, training, serving, deletion, verification."""
