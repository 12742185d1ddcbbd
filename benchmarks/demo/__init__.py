"""The main job from end to end: real digits, two networks pruned, traced, minimized and measured."""
