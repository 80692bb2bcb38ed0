"""Storage: where files are, how their bytes are read, and how they are written safely.

location       paths, URLs and pipes
masking        masks secrets in URLs and commands
files          reads byte ranges of local files, remote files (with retries) and pipes
command        runs the command of a pipe, for as long as it gives something
disk_cache     a bounded cache of remote files on the local disk, shared by processes
faults         tells errors of the machine from damaged data
json_lines     reads files of one JSON object a line, torn lines included
lfs_pointer    knows a pointer of Git LFS, which lies in place of a file that was not fetched
whole_file     the one way to write a file: complete or not at all, and synced
locks          file locks of the operating system
"""
