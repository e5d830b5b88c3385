"""The command ``s3t``: one file a command, each with ``add`` (its arguments) and ``run`` (report and text)."""
