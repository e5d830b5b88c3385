"""The roof over books and numerics: one file a verb; what they are made of lies in the rooms."""
