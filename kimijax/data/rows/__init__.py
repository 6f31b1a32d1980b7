"""Rows of tokens to train on, found by index: packed documents, chats, tasks, and mixtures."""
