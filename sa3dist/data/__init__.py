"""From any source of captioned audio to tensors: archives, decoding, the seeded stream of samples."""
