int moesaic_placeholder(void);
int moesaic_placeholder(void) { return 0; }
