"""What happens where tokens leave: which stay, what becomes of the others, and which patches survive."""
