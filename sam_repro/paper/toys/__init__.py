"""Small problems on which a paper's claim can be seen without training anything. No torch."""
