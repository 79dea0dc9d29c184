"""Files that somebody else has written: read without running what they name, refused in one sentence if they are broken."""
