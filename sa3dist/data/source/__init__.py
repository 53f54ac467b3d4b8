"""From archives, folders and shards of captioned audio to checked clips and an index."""
