"""Studies: arms × tasks × seeds, run resumably, compared honestly, reported."""
