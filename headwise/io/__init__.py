"""Read and write checkpoints: folders on disk, GGUF files, repositories on the Hub."""
