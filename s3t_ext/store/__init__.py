"""What is kept on disk: checked files, nodes by content address, records by slice. Imports nothing else of s3t_ext."""
