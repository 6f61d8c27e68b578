/* A library of one function. Compiled several times under several names it gives as many
 * different files as a test needs; -DNAME=x names the function after the copy. */
#ifndef NAME
#define NAME tiny
#endif
#define JOIN(a, b) a##b
#define FUNCTION(name) JOIN(name, _answer)

int FUNCTION(NAME)(void)
{
	return 42;
}
