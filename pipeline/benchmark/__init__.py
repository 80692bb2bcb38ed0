"""What the goals are measured by, each beside what it is compared with, in one run."""
