/* What the two halves of mapper share: mapper.c has the commands, mapper_threads.c the threads. */
#include <errno.h>
#include <stddef.h>

void answer(const char *format, ...) __attribute__((format(printf, 1, 2)));
void refuse(const char *what);
size_t number(const char *word);
size_t length_of(int fd);
int map_and_unmap(const char *path);

void do_thread(char **words);
void do_dup2race(char **words);
void forget_threads(void);
