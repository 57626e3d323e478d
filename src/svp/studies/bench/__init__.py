"""What `svp bench` measures: run.py tells the story, the other files one part each."""
