"""The `gavamoe` command."""
