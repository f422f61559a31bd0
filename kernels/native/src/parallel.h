/* Dividing numbered tasks over the threads of the OpenMP runtime that the host process has. */
#ifndef PS_PARALLEL_H
#define PS_PARALLEL_H

#include "types.h"

typedef void (*ps_task)(void *context, int64_t index);

/* Calls task(context, i) for each i in [0, count), on at most `threads` threads, in any order. */
void ps_parallel(ps_task task, void *context, int64_t count, int threads);

/* Calls body(context), with `threads` threads at hand all the while: each ps_parallel that it makes shares its
 * tasks with them, however many it asks for, for a fraction of what it costs to fetch them anew. */
void ps_with_team(void (*body)(void *context), void *context, int threads);

#endif
