"""A job: several processes, on one host or several, that run one model together."""
