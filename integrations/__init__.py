"""Where Redline meets the world: trainers, terminals, servers, the command line."""
