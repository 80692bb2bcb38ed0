"""Where files lie and how their bytes are read: paths, URLs and pipes, retries, and a cache of bounded size on disk."""
